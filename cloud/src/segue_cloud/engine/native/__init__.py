"""The step of a Llama in bfloat16 as one piece of compiled code, for CPUs with AVX512-BF16.

`tiles` multiplies, `panels` lays the weights out for it, `team` keeps the threads together, `step`
is the model, `model` is what the runner sees. Nothing here is imported where it cannot run.
"""
