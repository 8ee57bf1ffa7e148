"""OpenAI's voice protocols over the same engine, as thin dialects of the native messages (`docs/openai.md`)."""

REALTIME_PATH = "/v1/realtime"
LIVE_PATH = "/v1/live/sessions"
OPENAI_PATHS = (REALTIME_PATH, LIVE_PATH)
