"""Text: where it comes from, how the chat template renders it, how it becomes sequences."""
