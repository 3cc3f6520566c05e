"""Quality of masks: how much of the named object they hide, and how well cached maps follow a crop."""
