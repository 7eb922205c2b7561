"""Tile sizes of the kernels in csrc/cuda, by which launches are cut and workspaces sized: equal to the sources' own."""

GRADIENT_FEATURES, GRADIENT_PANEL, GRADIENT_ROWS = 32, 512, 128  # gradient_problem.cuh; a panel counts inputs
CONV_FEATURES = 64  # conv.cuh, of the forward
SCALE_SHIFT_COLUMNS, SCALE_SHIFT_ROWS = 32, 32  # scale_shift_grad_.cu
