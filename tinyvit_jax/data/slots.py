"""Numbers of the draws that a view and a pair consist of: the second argument of `draws.unit`.

Ranges leave room; a slot is never given a second meaning, since stores replay through them.
"""

TOP, LEFT, FLIP = 0, 1, 2
JITTER = 10  # order, brightness, contrast, saturation
ERASE, ERASE_TOP, ERASE_LEFT, ERASE_NOISE = 20, 21, 22, 23
GREY = 30
CROP_TRY, ERASE_TRY = 100, 200  # area and ratio of each attempt
OPS = 300  # of RandAugment, and all after it
# Of a pair, whose seed is that of one view XOR that of the other.
MIX, SWITCH, MIX_TOP, MIX_LEFT, BETA = 10_000, 10_001, 10_002, 10_003, 10_100
