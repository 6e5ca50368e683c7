"""llm_jax: language models and everything done to them, as pure functions on pytrees.

Importing this package imports nothing else and touches no device; import the part you need, for example
`from llm_jax import interop`.
"""

__version__ = "0.1.0"
