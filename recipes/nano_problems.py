"""Which problems does the nano recipe learn, and how are they worked aloud? Two serial families of reasoning-gym.

The problem, its answer and the verifier are reasoning-gym's. Ours are the short wording that the nano model reads (the
original's English is several times as long as the work itself) and the worked trace.

Both families are chains of permutations that do not commute, so a shallow model cannot jump to the end but can take one
step at a time. Families that add up (sums, counts) would not do: a small model does those in its head as well as aloud.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import reasoning_gym


@dataclass(frozen=True)
class Problem:
    family: str
    question: str
    trace: str  # the work, step by step
    answer: str  # reasoning-gym's
    entry: dict  # reasoning-gym's own item, which its verifier needs

    @property
    def messages(self) -> list[dict]:
        return [{"role": "user", "content": self.question}]


# A small model finds the next step by looking up its letter, where it could not count.
STEPS = "abcdefgh"


# -- color_cube_rotation: six coloured sides, a few turns, which colour is now on one side? ---------------------------
SIDES = ("top", "right", "front", "left", "back", "bottom")
# Where each side (in the order of SIDES) was before the turn that brings the named side to the top.
CUBE_TURNS = {
    "front": ("front", "right", "bottom", "left", "top", "back"),
    "right": ("right", "bottom", "front", "top", "back", "left"),
    "back": ("back", "right", "top", "left", "bottom", "front"),
    "left": ("left", "top", "front", "bottom", "back", "right"),
    "bottom": ("bottom", "right", "back", "left", "front", "top"),
}


def solve_cube(entry: dict) -> tuple[str, str, str]:
    """Question, trace, answer. The trace follows the asked side back, turn by turn, to where it was at the start."""
    facts = entry["metadata"]
    # One word for each use (F the face, Front the turn, front the place), so that a lookup hits one thing only.
    face = {side: f"{letter} {facts['initial_state'][side]}" for side, letter in zip(SIDES, "URFLBD")}
    turns = [f"{step} {side.capitalize()}" for step, side in zip(STEPS, facts["rotations"])]
    question = f"cube: {' '.join(face.values())}\nturns: {' '.join(turns)}\nside: {facts['target_side']}"
    side, work = facts["target_side"], ""
    for turn, name in zip(reversed(turns), reversed(facts["rotations"])):
        side = CUBE_TURNS[name][SIDES.index(side)]
        work += f" {turn} {side}"
    return question, f"{work} {face[side]}", facts["initial_state"][side]


# -- manipulate_matrix: a 2x2 matrix of digits, a few rotations and mirrors, what is it now? --------------------------
# Where each cell of (a b / c d), row by row, comes from; the names are ours.
MATRIX_MOVES = {
    "clockwise": (2, 0, 3, 1),
    "half": (3, 2, 1, 0),
    "counterclockwise": (1, 3, 0, 2),
    "full": (0, 1, 2, 3),
    "horizontal": (2, 3, 0, 1),
    "vertical": (1, 0, 3, 2),
    "diagonal": (0, 2, 1, 3),
    "antidiagonal": (3, 1, 2, 0),
}
MATRIX_NAMES = {
    ("rotate", "90"): "clockwise",
    ("rotate", "180"): "half",
    ("rotate", "270"): "counterclockwise",
    ("rotate", "360"): "full",
    ("hmirror", None): "horizontal",
    ("vmirror", None): "vertical",
    ("dmirror", None): "diagonal",
    ("cmirror", None): "antidiagonal",
}


def solve_matrix(entry: dict) -> tuple[str, str, str]:
    """Question, trace, answer. The trace says after each move which one move all so far come to, and applies it."""
    facts = entry["metadata"]
    digits = [digit for row in facts["matrix"] for digit in row]
    names = [MATRIX_NAMES[operation["transform"], operation.get("degrees")] for operation in facts["operations"]]
    cells = [f"{cell}{digit}" for cell, digit in zip("wxyz", digits)]
    moves = [f"{step} {name}" for step, name in zip(STEPS, names)]
    question = f"matrix: {' '.join(cells)}\nmoves: {' '.join(moves)}"
    name_of = {sources: name for name, sources in MATRIX_MOVES.items()}
    total, work = MATRIX_MOVES["full"], ""
    for move, name in zip(moves, names):
        total = tuple(total[source] for source in MATRIX_MOVES[name])
        work += f" {move} {name_of[total]}"
    a, b, c, d = (digits[source] for source in total)
    return question, f"{work} {' '.join(cells[source] for source in total)}", f"{a} {b}\n{c} {d}"


# -- drawing problems ---------------------------------------------------------------------------------------------
# A weight w counts as exp(w) in reasoning-gym's manipulate_matrix, so "never" is a large negative number, not 0.
NEVER = -1000.0
FAMILIES: dict[str, tuple[Callable, dict]] = {
    "color_cube_rotation": (solve_cube, {"min_rotations": 4, "max_rotations": 6}),
    "manipulate_matrix": (
        solve_matrix,
        {
            "min_rows": 2, "max_rows": 2, "min_cols": 2, "max_cols": 2, "min_transforms": 5, "max_transforms": 8,
            "w_map": NEVER, "w_crop": NEVER, "w_remove_every_nth_row": NEVER, "w_remove_every_nth_col": NEVER,
            "w_zero_divisible": NEVER,
        },
    ),
}  # fmt: skip


def stream_family(family: str, seed: int) -> Iterator[Problem]:
    """Endless problems of one family, repetitions among them (`draw_problems` removes those)."""
    solve, settings = FAMILIES[family]
    # reasoning-gym draws item i from `seed + i`: seeds a billion apart cannot run into each other.
    source = reasoning_gym.create_dataset(family, seed=seed * 10**9, size=10**9, **settings)
    for index in count():
        entry = source[index]
        question, trace, answer = solve(entry)
        assert answer == entry["answer"], f"our solver says {answer!r}, reasoning-gym {entry['answer']!r}: {question}"
        yield Problem(family, question, trace, entry["answer"], entry)


def draw_problems(size: int, *, seed: int) -> list[Problem]:
    """`size` problems with distinct questions, the families taking turns."""
    seen = set()

    def fresh(family):
        for problem in stream_family(family, seed):
            if problem.question not in seen:
                seen.add(problem.question)
                yield problem

    turns = zip(*(fresh(family) for family in FAMILIES))
    return list(islice((problem for turn in turns for problem in turn), size))


def score(problem: Problem, answer: str | None) -> bool:
    """reasoning-gym's verdict. Its partial credit (an answer that contains the right one) counts as wrong."""
    return reasoning_gym.get_score_answer_fn(problem.family)(answer, problem.entry) == 1.0
