"""Every speed or quality figure that the README quotes, as a command that prints it."""
