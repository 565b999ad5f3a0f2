// All of an instruction set's operations in one table. Included once per instruction set, after the others (pass_*.cpp).

constexpr PassOps kOps = {
    attend,       merge_block,  dot,     scale,     rms_norm,           layer_norm,           swiglu,
    gelu_tanh,    rotate_halves, rotate_pairs, largest, judge_row,        lora_down,            lora_up,
    to_half,      table_dots<float>, table_dots<uint16_t>, table_dots_bfloat, round_rows16, search_scales16,
};
