"""Video decoding: containers, orientation, frames in order, and detection of damaged files."""
