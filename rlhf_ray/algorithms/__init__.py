"""Pure functions of tensors: advantages, losses, KL, reward shaping, off-policy correction.

Nothing here knows of models, engines or processes; hyperparameters come in the frozen settings. Each formula names its
source and is tested against a brute force or a closed form. Token-level data is flat: `[R]` response tokens of
consecutive samples, and `lengths` (`[B]` int64, each at least 1) says where one sample ends and the next begins, so no
result can depend on padding. What has to be summed over a learner's ranks goes through an `AllReduce` of the caller.
"""
