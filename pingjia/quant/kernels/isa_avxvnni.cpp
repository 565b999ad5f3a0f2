namespace pingjia { struct KernelSet; extern const KernelSet* const kAvxVnni; const KernelSet* const kAvxVnni = nullptr; }
