"""Failures keep what they are across processes, and are classified by what they are."""

import errno
import pickle

import pytest
import torch

from rlhf_ray.failures import BadInput, FailureKind, RoleFailure, classify


def test_a_role_failure_crosses_processes_whole():
    failure = RoleFailure(FailureKind.DATA, "reward-1", "10.0.0.7", "too long", "Traceback …")
    arrived = pickle.loads(pickle.dumps(failure))
    assert vars(arrived) == vars(failure)
    assert str(arrived) == "reward-1 on 10.0.0.7: too long (data failure)"


def test_bad_input_crosses_processes_in_one_line():
    arrived = pickle.loads(pickle.dumps(BadInput("policy.model", "there is no such folder", "a folder")))
    assert str(arrived) == "policy.model: there is no such folder; a folder"
    assert (arrived.where, arrived.found, arrived.allowed) == ("policy.model", "there is no such folder", "a folder")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TimeoutError("late"), FailureKind.INFRASTRUCTURE),
        (ConnectionResetError(), FailureKind.INFRASTRUCTURE),
        (BrokenPipeError(), FailureKind.INFRASTRUCTURE),
        (RoleFailure(FailureKind.DATA, "reward-0", "?", "no tokens"), FailureKind.DATA),
        (ValueError("wrong"), FailureKind.FATAL),
        (FileNotFoundError("gone"), FailureKind.FATAL),
        (MemoryError(), FailureKind.INFRASTRUCTURE),
        (OSError(errno.EIO, "input/output error"), FailureKind.INFRASTRUCTURE),
        (OSError(errno.ENOSPC, "no space left"), FailureKind.FATAL),
        (torch.distributed.DistNetworkError("closed"), FailureKind.INFRASTRUCTURE),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), FailureKind.INFRASTRUCTURE),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), FailureKind.FATAL),
    ],
)
def test_kinds(error: BaseException, kind: FailureKind):
    assert classify(error) is kind
