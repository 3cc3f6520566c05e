"""Reading what the stages wrote."""
