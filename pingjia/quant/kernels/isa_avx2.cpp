namespace pingjia { struct KernelSet; extern const KernelSet* const kAvx2; const KernelSet* const kAvx2 = nullptr; }
