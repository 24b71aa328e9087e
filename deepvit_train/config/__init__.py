"""The typed configuration: what each key means, its unit and its bounds. Values live in configs/*.yaml.

Nothing here imports torch, so that `--help` and a configuration error answer at once.
"""
