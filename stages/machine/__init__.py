"""What this machine offers: devices, threads, the fp32 path, the cache folder, the hub."""
