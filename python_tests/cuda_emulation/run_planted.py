"""Runs one planted kernel here, where a sanitizer may end the process: LIBRARY KERNEL MISTAKEN SEED. Prints it."""

import ctypes
import sys

library = ctypes.CDLL(sys.argv[1])
kernel, mistaken, seed = map(int, sys.argv[2:])
inputs = (ctypes.c_float * 64)(*range(1, 65))
outputs = (ctypes.c_float * 64)()
library.ulr_emulate_seed(ctypes.c_uint32(seed))
code = library.ulr_planted(kernel, mistaken, outputs, inputs)
print(*(f"{value:g}" for value in outputs) if not code else ("failed",))
