"""`medllm demo --study`: the paper's six facts over several seeds of the miniature world, with ablations."""
