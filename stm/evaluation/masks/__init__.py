"""Quality of masks: how much of the captioned object they hide, and how well cached maps follow a crop."""
