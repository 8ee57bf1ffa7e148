"""What a person at a terminal sees and hears: devices, playback, meters, and the server that the client starts."""
