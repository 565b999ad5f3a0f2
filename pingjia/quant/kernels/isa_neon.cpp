namespace pingjia { struct KernelSet; extern const KernelSet* const kNeon; const KernelSet* const kNeon = nullptr; }
