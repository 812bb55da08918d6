"""What several commands share: options, targets, files, bars of progress."""
