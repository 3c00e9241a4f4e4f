"""Fast training and scoring: static shapes, CUDA graphs, fused kernels, packed adapters. Imported only where a cell runs, so torch may stand at the top."""
