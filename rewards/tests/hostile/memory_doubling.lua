-- may end in: memory runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local x = "x" while true do x = x .. x end end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
