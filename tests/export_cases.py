"""What the tests of exports share: plans to fold with, and sizes that make wide heads."""

EXACT = {"rtol": 2e-4, "atol": 2e-4}
#: Heads of 32, so that two virtual heads make one of 64, which kernels have.
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
LLAMAS = ["llama-mha", "llama-bias", "llama-yarn", "llama-llama3", "qwen2"]
GROUPED = {"key_basis": "grouped"}
FREQUENCY = {"key_basis": "frequency"}
