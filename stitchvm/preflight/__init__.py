"""`stitchvm check`: are the files that a configuration names complete and right, before anything is loaded?

    stitchvm check --config configs/nft_sd35m.yaml [--config OVERLAY] [--KEY VALUE ...]

Only JSON, safetensors headers and file sizes are read, so that it takes seconds; nothing is downloaded and the hub is
not asked. One row for each thing that was looked at:

    ok         complete, and what the configuration takes it for
    download   a hub id that is not in the local cache: the run will fetch it
    gated      the same, but its licence has to be accepted first and there is no token
    missing    a file or folder is not there
    wrong      it is there and cannot be used: truncated, of another architecture, in another latent space

The exit code is 1 if anything is gated, missing or wrong. An option or value that no run takes is refused in a run's
own words, with exit code 2.
"""

from stitchvm.preflight.command import main
from stitchvm.preflight.findings import Finding

__all__ = ["Finding", "main"]
