-- may end in: timeout instructions ok memory
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local a, b, t = string.rep("x", 2e6) .. "a", string.rep("x", 2e6) .. "b", {} for i = 1, 50000 do t[i] = i % 2 == 0 and a or b end table.sort(t) return 1 end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
