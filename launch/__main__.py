"""`python -m launch {gke,xpk,gcluster,tpu-vm}` is `medllm launch`, from a checkout."""

import sys

from medllm_jax.cli.launch import main

sys.exit(main())
