"""Starting runs on TPUs."""
