"""`python -m tools.convert_hf {from-hf,to-hf,verify}` is `medllm convert`, from a checkout."""

import sys

from medllm_jax.cli.convert import main

sys.exit(main())
