namespace pingjia { struct KernelSet; extern const KernelSet* const kNeonDot; const KernelSet* const kNeonDot = nullptr; }
