"""The attention kernels of ours, one file each, called as the file is."""
