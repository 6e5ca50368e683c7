"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, both ways, for every family.

`peft_names` says where things are, from a family's rules; `peft_config` what the config means; `peft_match` how PEFT
finds modules by name; `peft_fused` joins and cuts GPT-2's fused projection. `peft_load` reads with `peft_tensors`,
`peft_whole` and `peft_nodes`; `peft_save` writes with `peft_lora`.
"""

from llm_jax.interop.huggingface.peft_load import load as load
from llm_jax.interop.huggingface.peft_save import save as save
from llm_jax.interop.huggingface.peft_tensors import FILE as FILE
