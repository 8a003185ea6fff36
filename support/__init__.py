"""What any program of this kind needs: settings, input, checkpoints, logs, ranks."""
