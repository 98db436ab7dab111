#pragma once
#define VARKERN_CUDA_ARCHITECTURES "emulation"
