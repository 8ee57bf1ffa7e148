"""What a session does, pure: turns, playback, turn taking by voice."""
