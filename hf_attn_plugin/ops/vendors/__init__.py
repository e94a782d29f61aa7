"""Other people's attention kernels behind our call: each module refuses what its kernels cannot."""
