"""The course of a session, pure: turns, playback, turn taking by voice."""
