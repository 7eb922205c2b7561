import sys

from ulr_kernels.cli import main

sys.exit(main())
