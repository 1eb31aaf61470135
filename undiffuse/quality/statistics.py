"""Files of reference statistics: ours, and those of TTUR, pytorch-fid, EDM and ADM."""
