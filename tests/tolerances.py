"""How close is equal?  Each tolerance with the measurement it comes from: fp32, initialiser range 0.2, largest difference.

Measured over the 40 configs of test_modeling_axk1.py; summation order is all that differs.
"""

# Measured 6.9e-6.
PREFILL = 1e-5
# Measured 1.0e-5 beside stock, 8.6e-6 beside our own full pass; stock's cached step beside its own prefill differs by 9.7e-6.
CACHED_STEP = 2e-5
# Relative to the largest gradient of the parameter (at least a thousandth of the model's largest); measured 2.7e-5.
GRADIENT = 1e-4
# Our CPU experts beside the loop of moe_reference.py, outputs and gradients relative to the largest entry; measured 9.9e-7.
EXPERTS = 3e-6
# A converted model beside megatron-core's own logits (largest 2.2 to 2.7), fp32; measured 4.1e-6, multi-token prediction 3.0e-6.
MEGATRON = 1e-5
# The fused routing kernel beside torch_route, weights (which sum to 2.5) and gradients, absolute; measured 1.2e-7.
ROUTING = 5e-7
# The loss in chunks beside cross_entropy of whole logits, fp32, relative to the largest entry; measured 6.3e-7.
FUSED_LOSS = 2e-6
