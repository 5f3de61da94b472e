"""StitchVM: value models for noisy diffusion latents, stitched from clean-image rewards.

Axis legend of every docstring: B batch, C latent channels, H W latent height and width, h w token
grid, N tokens (N = h w, or more with special tokens), D width, E embedding width, K noise levels.
Time: t = 0 is clean data, t = 1 is Gaussian noise, σ_t = t.
"""

from stitchvm._version import __version__

__all__ = ["__version__"]
