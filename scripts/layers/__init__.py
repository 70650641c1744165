"""What the network is made of: factors and the sizes that they divide, layers that change the resolution, residual and
attention blocks that keep fewer feature maps, the linear shortcut, and convolutions that stay in float32 where bfloat16
fails.
"""

from scripts.layers.factors import padded_size, per_axis, per_transition
from scripts.layers.lean_blocks import use_lean_blocks
from scripts.layers.linear_shortcut import LinearShortcut
from scripts.layers.resampling import Downsample, SubpixelDownsample, SubpixelUpsample, Upsample
