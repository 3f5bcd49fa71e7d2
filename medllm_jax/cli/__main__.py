"""`python -m medllm_jax.cli` is `medllm`."""

import sys

from medllm_jax.cli import main

sys.exit(main())
