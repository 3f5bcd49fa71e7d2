"""Starts runs on TPUs: `python -m launch {gke,xpk,gcluster,tpu-vm}` (docs/launch.md). Nothing here touches JAX."""
