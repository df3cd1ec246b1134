"""The recipe: one YAML file, typed and checked before any process group exists. Nothing in here imports torch.

Importing this package loads nothing else, so that ``megatron_gkd.ops`` needs only torch and numpy.
"""
