"""Trains, exports and measures the small Whisper model that is bundled as the demo model."""
