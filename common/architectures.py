"""The architectures that can be trained, by the name that a Hugging Face config gives them."""

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
