"""Low-rank adapters (LoRA) on a sharded Megatron model: the same factors and gradients under every layout.

mcore-bridge's `LoraParallelLinear` computes with them. It is inserted into the model here rather than by PEFT's
`get_peft_model`, which numbers layers within a pipeline stage and refuses a stage without a match, and whose options
mcore-bridge drops.
"""
