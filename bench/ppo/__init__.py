"""A PPO step against its peers and its parts: `make bench-ppo`, or `python -m bench.ppo --help`.

Every comparison is of the same model, the same number of sequences and tokens, the same type and the same cores, in one
run and in alternation. Our side is the command `rlhf-ray ppo` and the files that it writes; the other sides are TRL,
vLLM, and a few dozen lines of torch, each in processes of its own.
"""
