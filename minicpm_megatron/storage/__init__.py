"""Bytes on disk: whole-or-absent files, checksum manifests and sharded tensors. Needs no process group."""
