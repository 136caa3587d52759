"""Named tensors in files: sources to read from, an atomic sharded writer, and the task-vector artefact."""
